"""What happened and why, for people: explain, report and dump. Reads decisions, changes nothing."""
