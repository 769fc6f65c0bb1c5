"""A model behind HTTP: completions as OpenAI has them, a page, metrics; see docs/serving.md."""
