"""What runs inside a sandbox: the server, and the wire that both sides share.

Standard library, aiohttp and orjson only, Python 3.11+: this package is staged onto an environment's own interpreter.
"""
