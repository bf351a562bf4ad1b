"""Lists and thresholds in Triton."""
