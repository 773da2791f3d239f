"""`dflash-kernels serve`: OpenAI's HTTP API on top of `dflash_decode.LLM`.

cli.py has the command and server.py the process; app.py has the routes. fields.py has the requests' fields, reading.py
what they come to, replies.py the answers' fields, chat.py and completions.py the answers. desk.py lets requests in and
follows them to their end, errors.py says what goes wrong.
"""
