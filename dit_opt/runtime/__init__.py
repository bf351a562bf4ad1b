"""What happens at run time: which step it is, which graph runs, what is remembered between steps.

Knows neither passes nor facts; the backend hands it compiled graphs and plain numbers.
"""
