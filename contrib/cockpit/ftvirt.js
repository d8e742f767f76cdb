// SPDX-License-Identifier: Apache-2.0

// Shows the page that the agent serves, by way of Cockpit's own connection to
// the host, so that the agent need listen on its loopback only.
"use strict";
(() => {
	const config = "/etc/ftvirt/ftvirt.toml";
	const period = 5000; // milliseconds
	const notice = document.getElementById("notice");
	const page = document.getElementById("page");

	const say = text => {
		if (notice.textContent !== text) notice.textContent = text;
	};

	// address is what listen in [web] of ftvirt.toml says, seen from the host.
	const address = text => {
		let table = "";
		for (const line of (text || "").split("\n")) {
			const head = line.match(/^\s*\[([^\]]+)\]/);
			if (head) table = head[1].trim();
			const listen = line.match(/^\s*listen\s*=\s*["']([^"']*)["']/);
			if (table !== "web" || !listen) continue;
			const parts = listen[1].match(/^(.*):(\d+)$/);
			if (!parts) return null;
			const host = parts[1].replace(/^\[(.*)\]$/, "$1");
			return { address: ["", "0.0.0.0", "::"].includes(host) ? "127.0.0.1" : host, port: Number(parts[2]) };
		}
		return null;
	};

	// show takes over what the agent drew. It has no script, and none would run.
	const show = text => {
		const drawn = new DOMParser().parseFromString(text, "text/html");
		const main = drawn.querySelector("main");
		if (!main) throw new Error("what answers is not ftvirt's agent");
		const focus = document.activeElement && document.activeElement.getAttribute("href");
		page.replaceChildren(...main.childNodes);
		if (focus) {
			const again = [...page.querySelectorAll("a")].find(a => a.getAttribute("href") === focus);
			if (again) again.focus({ preventScroll: true });
		}
		say(drawn.title + ", " + new Date().toLocaleTimeString());
	};

	// The address bar is Cockpit's: a link within the page only scrolls.
	page.addEventListener("click", event => {
		const link = event.target.closest("a[href^='#']");
		if (!link) return;
		event.preventDefault();
		const to = document.getElementById(link.getAttribute("href").slice(1));
		if (to) to.scrollIntoView();
	});

	const ask = where => {
		const agent = cockpit.http(where);
		return agent.get("/").then(show).catch(error => {
			// What is old must not pass for what is.
			page.replaceChildren();
			say("The agent does not answer at " + where.address + ":" + where.port + ": " + (error.message || error) +
				". See to ftvirt-agent.service.");
		}).finally(() => agent.close());
	};

	const loop = () => {
		cockpit.file(config).read().then(text => {
			const where = address(text);
			if (where) return ask(where);
			page.replaceChildren();
			say("The agent serves no page: set listen in [web] of " + config + ", as \"127.0.0.1:7703\", and restart it.");
		}).catch(error => {
			page.replaceChildren();
			say(config + ": " + (error.message || error));
		}).finally(() => setTimeout(loop, period));
	};
	loop();
})();
