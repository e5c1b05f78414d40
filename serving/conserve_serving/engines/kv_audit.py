"""Recounts a KV pool from its tree. Costs the whole tree: for tests and for hunting a leak."""

from __future__ import annotations

from conserve_serving.engines.kv import KvPool
from conserve_serving.engines.kv_nodes import Node


def problems(pool: KvPool) -> list[str]:
    """What is wrong with the pool's books; an empty list when everything adds up."""
    found: list[str] = []
    refs: dict[Node, int] = {}
    for session, leaves in pool.sessions.leaves.items():
        for leaf in leaves:
            if not leaf.tokens or leaf.sessions is None or session not in leaf.sessions:
                found.append(f"session {session}: a leaf is unmarked or dropped")
            walk = leaf
            while walk is not pool.root:
                refs[walk] = refs.get(walk, 0) + 1
                if walk.parent is walk:
                    found.append(f"session {session}: a leaf is not in the tree")
                    break
                walk = walk.parent
    locked = evictable = host = 0
    stack = list(pool.root.children.values())
    while stack:
        node = stack.pop()
        children = node.children.values()
        stack.extend(children)
        if node.content.tokens != node.tokens or node.tokens <= 0:
            found.append(f"node of {node.tokens} tokens holds {node.content.tokens}")
        if node.tokens % pool.page_tokens:
            found.append(f"node of {node.tokens} tokens is not whole pages")
        if node.parent.children.get(node.content.key_at(0)) is not node:
            found.append("a node is linked under another key")
        if node.device_children != sum(child.on_device for child in children):
            found.append("device_children is wrong")
        if node.device_children and not node.on_device:
            found.append("device KV below host KV")
        if node.locks < sum(child.locks for child in children):
            found.append("a path is locked below but not above")
        if node.session_refs != refs.get(node, 0):
            found.append(f"session_refs {node.session_refs}, counted {refs.get(node, 0)}")
        if not node.on_device:
            host += node.tokens
        elif node.locks:
            locked += node.tokens
        else:
            evictable += node.tokens
    for name, counted, booked in (
        ("locked", locked, pool.locked_tokens),
        ("evictable", evictable, pool.evictable_tokens),
        ("host", host, pool.host_used_tokens),
    ):
        if counted != booked:
            found.append(f"{name}: booked {booked}, counted {counted}")
    if pool.private_tokens < 0 or pool.available_tokens < 0:
        found.append(f"private {pool.private_tokens}, available {pool.available_tokens}")
    if host > pool.host_capacity_tokens:
        found.append(f"host holds {host} of {pool.host_capacity_tokens}")
    return found
