package engine

// allowed judges a packet that would be forwarded by the security groups of its sender and its receiver.
func (r *Router) allowed(from, to *endpoint, p *Packet) bool {
	return true
}
