"""Where a call comes from, by network."""

from __future__ import annotations

import ipaddress


def network_of(address: str, ipv4: int = 32, ipv6: int = 64) -> str:
    """The network of an address.

    Parameters
    ----------
    address : str
        IPv4 or IPv6.
    ipv4, ipv6 : int
        Length of the prefix in bits. One host may use a whole /64 of IPv6 (RFC 4291, 2.5.4).

    Returns
    -------
    str
        Such as ``192.0.2.0/24``; empty where the address is none.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    found = getattr(found, "ipv4_mapped", None) or found
    return str(ipaddress.ip_network((found, ipv4 if found.version == 4 else ipv6), strict=False))
