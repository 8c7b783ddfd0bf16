"""Roll out attention: which token after the last layer owes to which token of the input."""
