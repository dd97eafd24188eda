"""The HTTP gateway: OpenAI API in, token ids to the scheduler, text out."""
