"""How much softmax mass blocks hold: of every row, or of sampled rows in any order of the keys."""
