"""LongLink: a synthetic benchmark of planted long-range links, with ceilings in closed form."""
