"""Pages of the reference, made from the code each time the site is built."""
