"""What `stillhouse manifest` derives a KubeRay RayJob from: the spec, and its options."""
