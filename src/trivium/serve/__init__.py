"""An OpenAI-compatible server and its page; the one room that knows a web framework."""
