"""The main job end to end: recipes, runs, reports."""
