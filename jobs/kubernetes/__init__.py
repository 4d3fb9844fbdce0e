"""A KubeRay RayJob for a spec: `stillhouse manifest`."""
