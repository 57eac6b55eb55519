"""Does far history help on the data of this plant, and what do simple detectors reach on it at the same alarm budget?"""
