"""Serving on many machines with Ray Serve: `serve run deploy/ray/serve.yaml`.

Three deployments make the application (`app.build`):

- `Model` (replica): a replica is the whole server as it is on one machine, engine and FastAPI
  application, without a socket of its own;
- `Ingress` (ingress): takes HTTP from Ray's proxies, chooses a replica, passes its answer through
  as it comes, and ends it in words if the replica dies;
- `Rollout` (rollout): one process that gives new checkpoints to one replica after another.

What decides is pure and needs no Ray: `affinity` (which replica), `scaling` (how many), and the
order of a rollout. `router` and `app` join it to Ray.
"""
