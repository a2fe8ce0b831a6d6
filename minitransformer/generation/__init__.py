"""From a model to text: processors of logits, the loop that decodes, and tokens that become text as they come."""
