"""What makes a trained model smaller: fewer bits, fewer weights, fewer heads, hidden units or layers."""
