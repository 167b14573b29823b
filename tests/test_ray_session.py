"""The Ray that a command starts for itself is no service to the network."""

import ipaddress
import subprocess
import sys

SCRIPT = """
from qvpo_rllib.ray_session import keep_private, start_ray

keep_private(None)
start_ray(1)
import psutil, ray

ray.get(ray.remote(lambda: None).remote())  # a worker has ports of its own
driver = psutil.Process()
for process in [driver, *driver.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print(connection.laddr.ip)
"""


def test_no_port_of_rays_is_open_to_the_network() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    addresses = result.stdout.split()
    assert len(addresses) >= 4, result.stderr
    for text in addresses:
        address = ipaddress.ip_address(text)
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_loopback, addresses
