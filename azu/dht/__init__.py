"""What `azu-dht` shows of a swarm.

commands    one function a command: join, ask, print; watch does so again and again, with window for what it draws

visit       joins a swarm, and leaves it; diagnosis says why nobody lets us in
survey      everybody who is there; lookups: one peer, record or model

snapshot    what a survey found; kinds: the kinds of records
coverage    which layers of which model somebody has loaded
names       what an operator types to name a peer, a record or a model
peers, models, record, answers, tracing     what was found -> rows, fields and lines for people, documents for programs

text        strangers' text made fit for a terminal
screen      tables, and cards where a terminal is too narrow for one

Only visit, diagnosis, survey, lookups and watch do IO.
"""

from __future__ import annotations

__all__: list[str] = []
