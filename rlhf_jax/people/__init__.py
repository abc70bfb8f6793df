"""People in the loop: their labels, how far they agree, and the pages on which they give them."""
