module ftvirt.org/ftvirt

go 1.26.0

require (
	golang.org/x/sys v0.49.0 // indirect
	libvirt.org/go/libvirt v1.11010.0 // indirect
)
