"""The server: FastAPI around the engine.

Layers, from the ground up: settings and errors; schemas (what a client may say); generation (one
request from text to token events); routes; app (the whole, with its lifespan); serve (a process
that drains on SIGTERM). Imports the engine, never training.
"""
