"""What can be chosen by name, one row each."""
