"""What a recipe may run, a task a file."""
