"""Confidential containers: ordinary container images inside enclaves.

Kept empty of imports: the forwarding path of ``rune`` pays for every module that is loaded here.
"""

__version__ = "0.1.0"
