"""A drawn weight in memory, packed, or nowhere: how it is held and what torch can do with it. Knows no layer."""
