"""WebShop: shopping by instruction in a text shop, scored by the benchmark's own formula.

It needs the environments extra.
"""

from services.envs.webshop.environment import WebShopEnvironment

__all__ = ["WebShopEnvironment"]
