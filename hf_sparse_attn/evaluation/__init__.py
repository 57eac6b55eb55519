"""Quality of selections on unseen text."""
