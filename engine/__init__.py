"""The engine: models whose FFNs run dense or as a mixture of experts, and how they are served.

`model/` holds the decoder in torch's operators: it trains, and it is the reference. `cpu/` and
`gpu/` compute the same with kernels of their own. `text/` turns text into tokens and back, and
`serving/` schedules requests, runs the model and draws tokens. The engine knows no HTTP and no
training.
"""
