"""Features that training makes of videos when it first needs them."""
