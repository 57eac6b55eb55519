"""Prepared logs and sensors -> tokens of a causal language model, or patches, each with the rows it came from."""
