"""Serving on many machines with Ray Serve: `serve run deploy/ray/serve.yaml`.

Three deployments make the application (`app.build`):

- `Model` has the replicas (`replica`): each is the whole server as it is on one machine, with
  engine and FastAPI application, but without a socket of its own;
- `Ingress` (`ingress`) takes HTTP from Ray's proxies, chooses a replica, passes its answer on as it
  comes, and ends the answer with an error event if the replica dies;
- `Rollout` (`rollout`) is one process that gives new checkpoints to one replica after another.

The modules that decide need no Ray: `affinity` (which replica), `scaling` (how many), `rolling`
(which checkpoint, and in which order). `router` and `app` join them to Ray.
"""
