// Package suite is the published MCS conformance suite as one program.
package suite

import (
	"testing"

	"sigs.k8s.io/mcs-api/conformance"
)

func TestConformance(t *testing.T) {
	conformance.TestConformance(t)
}
