"""How arrays are laid out over the devices: the mesh, the rules, and the sums over replicas."""
