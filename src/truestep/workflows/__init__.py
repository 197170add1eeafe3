"""What the commands do, free of any command line: train, and look at what was trained."""
