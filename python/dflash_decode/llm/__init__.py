"""Text in, text out: `LLM` in api.py, on a decoder that runs in a thread of its own (engine.py).

params.py says how an answer is made, defaults.py what the model's generation_config.json says of that, text.py makes
the text as tokens arrive, grammars.py restricts it to a JSON schema or a regular expression, and outputs.py has the
results.
"""
