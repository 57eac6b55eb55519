"""Does far history help on the data of this plant, and what do simple detectors reach at the same alarm budget?"""
