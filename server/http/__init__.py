"""What surrounds every route: identity, key, bounds, deadline; errors, streams, logs and traces."""
