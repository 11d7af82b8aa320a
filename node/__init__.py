"""The worker: joins the swarm, advertises itself, fetches and serves layers, runs stages."""
