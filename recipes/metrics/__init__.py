"""How good an answer is, held against the reference: a number for each row, from 0 to 1, and its mean."""
