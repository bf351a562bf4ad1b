"""RainFusion's search among fixed patterns."""
