"""What one request and all waiting requests together may ask for.

They bound memory and the time that one client can make others wait.
"""

MAX_BODY_BYTES = 4 * 2**20
MAX_ROWS = 256  # observations of a request
MAX_K = 256
MAX_SAMPLES = 8_192  # observations × k of a request: about a second at the paper's network sizes
MAX_BATCH_SAMPLES = 1_024  # of requests computed together
MAX_PENDING_SAMPLES = 16_384
MAX_PENDING_REQUESTS = 256
