// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"html"
	"io"
	"math"
	"strconv"
	"strings"
)

// Curve is one line of a plot.
type Curve struct {
	Name   string
	Points [][2]float64
}

// Plot is a diagram of curves over time.
type Plot struct {
	Title, X, Y string
	Curves      []Curve
}

// What a plot looks like, in pixels.
const (
	plotWidth, plotHeight         = 900, 320
	plotLeft, plotRight           = 70, 160
	plotTop, plotBottom           = 34, 44
	plotInnerWidth, plotInnerHigh = plotWidth - plotLeft - plotRight, plotHeight - plotTop - plotBottom
)

// plotColours are told apart by those who cannot tell red from green, too
// (Okabe and Ito).
var plotColours = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"}

// WriteSVG draws the plot. Curves without points are left out.
func (p Plot) WriteSVG(w io.Writer) error {
	var left, right, top float64 = math.Inf(1), math.Inf(-1), 0
	for _, c := range p.Curves {
		for _, at := range c.Points {
			left, right, top = min(left, at[0]), max(right, at[0]), max(top, at[1])
		}
	}
	if left > right {
		left, right = 0, 1
	}
	if right == left {
		right++
	}
	yStep := tick(top)
	top = max(math.Ceil(top/yStep)*yStep, yStep)
	x := func(v float64) float64 { return plotLeft + (v-left)/(right-left)*plotInnerWidth }
	y := func(v float64) float64 { return plotTop + plotInnerHigh - v/top*plotInnerHigh }

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", plotWidth, plotHeight)
	text := func(x, y float64, anchor, what, more string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s"%s>%s</text>`+"\n", x, y, anchor, more, html.EscapeString(what))
	}
	text(plotLeft, 20, "start", p.Title, ` font-size="14"`)
	text(plotLeft+plotInnerWidth/2, plotHeight-8, "middle", p.X, "")
	text(16, plotTop+plotInnerHigh/2, "middle", p.Y, fmt.Sprintf(` transform="rotate(-90 16 %d)"`, plotTop+plotInnerHigh/2))
	for v := 0.0; v <= top*1.0001; v += yStep {
		fmt.Fprintf(&b, `<path d="M%d %.1fH%d" stroke="#ddd"/>`+"\n", plotLeft, y(v), plotLeft+plotInnerWidth)
		text(plotLeft-6, y(v)+4, "end", mark(v), "")
	}
	xStep := tick(right - left)
	for v := math.Ceil(left/xStep) * xStep; v <= right; v += xStep {
		fmt.Fprintf(&b, `<path d="M%.1f %dv4" stroke="#888"/>`+"\n", x(v), plotTop+plotInnerHigh)
		text(x(v), plotTop+plotInnerHigh+18, "middle", mark(v), "")
	}
	drawn := 0
	for _, c := range p.Curves {
		if len(c.Points) == 0 {
			continue
		}
		colour := plotColours[drawn%len(plotColours)]
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="1.2" points="`, colour)
		for i, at := range c.Points {
			if i > 0 {
				b.WriteByte(' ')
			}
			fmt.Fprintf(&b, "%.1f,%.1f", x(at[0]), y(at[1]))
		}
		b.WriteString(`"/>` + "\n")
		high := float64(plotTop + 12 + 18*drawn)
		fmt.Fprintf(&b, `<path d="M%d %.1fh16" stroke="%s" stroke-width="3"/>`+"\n", plotLeft+plotInnerWidth+8, high-4, colour)
		text(plotLeft+plotInnerWidth+30, high, "start", c.Name, "")
		drawn++
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// tick is a round distance between marks of an axis of some length.
func tick(length float64) float64 {
	if length <= 0 || math.IsInf(length, 0) {
		return 1
	}
	step := math.Pow(10, math.Floor(math.Log10(length)))
	for _, part := range []float64{5, 2} {
		if length/step < part {
			return step / 10 * part
		}
	}
	return step
}

// mark is a number without digits that say nothing.
func mark(v float64) string { return strconv.FormatFloat(math.Round(v*1e6)/1e6, 'f', -1, 64) }
