"""What files, processes and machines need: writes that survive a kill, progress, the environment."""
