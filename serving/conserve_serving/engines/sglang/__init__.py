"""Real SGLang: what runs inside its engines (store, plug-in), and what starts them (launch).

The modules that SGLang loads (``store``, ``plugin`` and what they import) use the standard library,
torch and SGLang only: its environment needs this package and none of its dependencies.
"""
