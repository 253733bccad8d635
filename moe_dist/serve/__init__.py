"""A model for others: OpenAI's HTTP interface in front of one engine. Needs the extra `serve`."""
