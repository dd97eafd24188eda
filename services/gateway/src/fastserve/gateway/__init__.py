"""The OpenAI-compatible HTTP gateway: text on one side, token ids on the other."""
