"""Follow the scores of hand-written attention from a product to its softmax and use."""
