"""One tiny pipeline of every kind that is served, of the libraries' own classes, with random weights."""
