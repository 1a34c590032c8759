"""`featherweight agent`: a small HTTP service on the device, which measures and runs models that others send.

`app` puts the routes together, `store` keeps files by their hash, `jobs` runs one job at a time in a child process,
`requests` reads what is asked, `tasks` is what the child does. `openapi.json` describes the whole interface.
"""

from __future__ import annotations

API = 1
"""Version of the interface; a client of another one is told so."""
